"""A process of a sharded training on CPUs; run by test_resume.py under torchrun.

accelerate shards over GPUs only. PyTorch itself shards on CPUs too, so these processes are declared
to be on GPUs, which is enough to run the whole path: sharding, checkpoints, resuming, export.

Arguments: model, text, output, steps, and the step at whose checkpoint to die (0 for never).
"""

from __future__ import annotations

import os
import sys

from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor

from fairy_compile.train import TrainConfig, run
from fairy_compile.train.trainer import QatTrainer


def declare_gpus(config, args):
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(model: str, text: str, output: str, steps: str, die_at: str) -> None:
    run._check_sharding = declare_gpus
    save = QatTrainer._save_checkpoint

    def save_and_die(trainer, *args):
        save(trainer, *args)
        sharded = all(isinstance(p, DTensor) for p in trainer.model.parameters())
        print("sharded weights:", sharded)
        if trainer.state.global_step == int(die_at):
            trainer.accelerator.wait_for_everyone()
            os._exit(9)

    QatTrainer._save_checkpoint = save_and_die
    config = TrainConfig(
        model, text, output, steps=int(steps), block=32, batch=4, lr=3e-3, log_every=2,
        save_every=6, cpu=True, fsdp=True,
    )  # fmt: skip
    report = run.train(config)
    print("resumed from", report.resumed_from)


main(*sys.argv[1:])
