"""Learning rates and weight decay over a run, as factors on their peaks.

wsd         warm-up, stable, decay: linear up, constant, then linear down to the end value
two-stage   warm-up; first half from the peak linearly down to 1/2; second half restarts at 1/3
            and goes linearly down to the end value, without weight decay. The two stages of
            BitNet b1.58 and iFairy: large steps first, then a fine stage in which latents may
            settle far from zero.
cosine      warm-up, then half a cosine down to the end value
constant    warm-up, then constant
"""

from __future__ import annotations

import math

from fairy_compile.train.config import TrainConfig

STAGE_ONE_END = 1 / 2
STAGE_TWO_START = 1 / 3


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Return the learning rate of optimiser step ``step`` (from 0) as a share of the peak.

    The last step, ``total - 1``, has the end value.

    Args:
        step: steps done.
        total: steps of the run.
        config: schedule, warm-up, decay and end value.
    """
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    end = config.lr_end
    step = min(step, total - 1)  # PyTorch also asks for the rate after the last step
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay = max(1, math.ceil(config.decay * total))
        left = min(1.0, (total - 1 - step) / decay)
        return end + (1 - end) * left
    if config.schedule == "two-stage":
        half = second_stage(total)
        if step < half:
            done = (step - warmup) / max(1, half - warmup)
            return 1 + (STAGE_ONE_END - 1) * done
        done = (step - half) / max(1, total - 1 - half)
        return STAGE_TWO_START + (end - STAGE_TWO_START) * done
    done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


def second_stage(total: int) -> int:
    """Return the first step of the second stage of ``two-stage``."""
    return total // 2


def weight_decay(step: int, total: int, config: TrainConfig) -> float:
    """Return the weight decay of a step."""
    second = config.schedule == "two-stage" and step >= second_stage(total)
    return 0.0 if second else config.weight_decay
