"""Train the bundled demo model: a small Llama that writes Python, with 2-bit weights.

    python examples/bundled/train.py --minutes-fp 30 --minutes-qat 13 -o OUT

1. Build a corpus from the Python standard library and train a tokenizer (see corpus.py).
2. Train a LlamaForCausalLM in bf16 autocast with float32 master weights      -> OUT/fp
3. Train on with fake-quantised linear layers (straight-through gradients)    -> OUT/qat
4. Convert the latents of step 3 to a packed checkpoint with fairy_compile    -> OUT/model

A run that was stopped goes on with --resume: finished steps are skipped, and an unfinished one
continues from its last saved state. With --steps-fp and --steps-qat the length is counted in steps
instead of minutes, which makes a run repeatable on one machine and version of PyTorch.
"""

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import BEGIN, END, Corpus, Stream, build_corpus, save_tokenizer
from fakequant import HEAD_STAGES, STAGES, fake_quantise, latents, linears
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fairy_compile
from fairy_compile.frontends import open_source

TOKENS_PER_STEP = 32 * 256
CONTEXT = 1024
VOCAB_SIZE = 3072
VALIDATION_TOKENS = 65536
SAVE_EVERY_S = 180.0


@dataclass
class Schedule:
    """How long a training phase runs and how its learning rate moves."""

    name: str
    minutes: float
    steps: int | None
    peak_lr: float
    warmup: int
    floor: float
    weight_decay: float

    def progress(self, step: int, elapsed: float) -> float:
        """Return the share of the phase that is done, 0 to 1."""
        return step / self.steps if self.steps else elapsed / (60.0 * self.minutes)

    def learning_rate(self, step: int, progress: float) -> float:
        """Cosine from the peak to floor * peak, after a linear warm-up."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return (
            self.peak_lr
            * min(1.0, (step + 1) / self.warmup)
            * (self.floor + (1.0 - self.floor) * cosine)
        )


# ----------------------------------------------------------------------------- model and training


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual branches start small, or deep models start with loud noise
        for name, layer in linears(model).items():
            if name.endswith(("o_proj", "down_proj")):
                layer.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def draw_batch(corpus: Corpus, step: int, generator: torch.Generator) -> torch.Tensor:
    """Draw one batch, half source and half chat; every fourth one fills the whole context."""
    length = CONTEXT if step % 4 == 3 else 256
    half = TOKENS_PER_STEP // length // 2
    source = corpus.train_source.anywhere(half, length + 1, generator)
    return torch.cat([source, corpus.train_chat.at_starts(half, length + 1, generator)])


def loss_of(model: nn.Module, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy of predicting each token of the batch from those before it."""
    logits = model(batch[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: nn.Module, stream: Stream, length: int = 256) -> dict[str, float]:
    """Evaluate in float32 on the head of a held-out stream."""
    model.eval()
    windows = stream.head(VALIDATION_TOKENS // length, length + 1)
    total = sum(loss_of(model, rows, "sum").item() for rows in windows.split(4096 // length))
    tokens = windows.shape[0] * length
    return {"loss": round(total / tokens, 4), "tokens": tokens}


def evaluate(model: nn.Module, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Return the validation losses that the README reports."""
    return {
        "source": validation_loss(model, corpus.valid_source),
        "source_1024": validation_loss(model, corpus.valid_source, CONTEXT),
        "chat": validation_loss(model, corpus.valid_chat),
    }


def train(
    model: nn.Module, corpus: Corpus, schedule: Schedule, state_path: Path, log: Callable
) -> dict[str, float]:
    """Train until the schedule ends, saving a resumable state now and then."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak_lr, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(sum(schedule.name.encode()))
    step, elapsed = 0, 0.0
    if state_path.exists():
        saved = torch.load(state_path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        step, elapsed = saved["step"], saved["elapsed"]
        log(f"{schedule.name}: going on at step {step}")

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "step": step, "elapsed": elapsed}
        partial = state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(state_path)  # a kill while writing must not cost the last good state

    last, last_save, recent = time.monotonic(), elapsed, []
    model.train()
    while (progress := schedule.progress(step, elapsed)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, progress)
        batch = draw_batch(corpus, step, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        recent.append(loss.item())
        if step % 20 == 0:
            left = elapsed / schedule.progress(step, elapsed) - elapsed
            log(
                f"{schedule.name} step {step}  loss {sum(recent) / len(recent):.3f}  "
                f"{TOKENS_PER_STEP * step / elapsed:.0f} tok/s  {max(left, 0) / 60:.1f} min left"
            )
            recent.clear()
        if elapsed - last_save > SAVE_EVERY_S:
            save()
            last_save = elapsed
    save()
    return {"steps": step, "tokens": step * TOKENS_PER_STEP, "minutes": round(elapsed / 60, 1)}


# ------------------------------------------------------------------------------------- the script


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write an ordinary float32 Hugging Face checkpoint of the (latent) weights."""
    model.save_pretrained(folder, state_dict=latents(model))
    save_tokenizer(tokenizer, folder, CONTEXT)


def record(out: Path, **values: object) -> None:
    """Add values to OUT/metrics.json."""
    path = out / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(metrics | values, indent=2) + "\n")


def run_fp(corpus: Corpus, schedule: Schedule, out: Path) -> None:
    """Train in floating point and measure the plain rule on the result."""
    torch.manual_seed(0)
    model = new_model(corpus.tokenizer)
    spent = train(model, corpus, schedule, out / "fp.state.pt", print_now)
    record(out, fp_training=spent, fp=evaluate(model, corpus))
    save_checkpoint(model, corpus.tokenizer, out / "fp")
    fake_quantise(model)
    record(out, plain_rule=evaluate(model, corpus))


def run_qat(corpus: Corpus, schedule: Schedule, out: Path) -> None:
    """Train on with fake-quantised linear layers."""
    model = LlamaForCausalLM.from_pretrained(out / "fp", dtype=torch.float32)
    fake_quantise(model)
    spent = train(model, corpus, schedule, out / "qat.state.pt", print_now)
    record(out, qat_training=spent, qat=evaluate(model, corpus))
    save_checkpoint(model, corpus.tokenizer, out / "qat")


def export(corpus: Corpus, out: Path) -> None:
    """Convert the latents to a packed checkpoint and measure what was really written."""
    quant = fairy_compile.QuantConfig(
        f"w{STAGES}", scale="tensor", stages_for={"lm_head": HEAD_STAGES}
    )
    report = fairy_compile.convert(out / "qat", out / "model", quant=quant, dense_dtype="float16")
    source = open_source(out / "model")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(out / "qat"))
    weights = {name: torch.from_numpy(source.dense(name)) for name in source.names()}
    model.load_state_dict(weights)
    quantised = sum(layer.weight.numel() for layer in linears(model).values())
    record(
        out,
        packed=evaluate(model, corpus),
        parameters=sum(p.numel() for p in model.parameters()),
        quantised_weights=quantised,
        bits_per_weight=round(report.bits_per_weight, 4),
        tensor_bytes=report.nbytes,
    )
    shutil.copy(out / "metrics.json", out / "model")


def print_now(line: str) -> None:
    """Print without buffering: the log of a long run should be readable while it runs."""
    print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes-fp", type=float, default=30.0, help="floating-point training")
    parser.add_argument("--minutes-qat", type=float, default=13.0, help="quantised training")
    parser.add_argument("--steps-fp", type=int, help="length in steps instead of minutes")
    parser.add_argument("--steps-qat", type=int, help="length in steps instead of minutes")
    parser.add_argument("--resume", action="store_true", help="go on with what OUT holds")
    parser.add_argument("--force", action="store_true", help="delete OUT and start again")
    return parser.parse_args()


def main() -> None:
    """Run the steps that OUT does not hold yet."""
    args = parse_arguments()
    out: Path = args.out
    if out.exists() and any(out.iterdir()) and not args.resume:
        if not args.force:
            raise SystemExit(
                f"{out} is not empty: give --resume to go on or --force to start again"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "tokenizer.json"
    print_now("Reading the Python standard library ...")
    known = Tokenizer.from_file(str(kept)) if kept.exists() else None
    corpus = build_corpus(VOCAB_SIZE, known)
    corpus.tokenizer.save(str(kept))
    streams = {"source": corpus.train_source, "chat": corpus.train_chat}
    sizes = {name: len(stream.tokens) for name, stream in streams.items()}
    print_now(f"Training tokens: {sizes}")
    record(out, python=platform.python_version(), torch=torch.__version__, train_tokens=sizes)

    fp = Schedule("fp", args.minutes_fp, args.steps_fp, 3e-3, 100, 0.02, 0.1)
    qat = Schedule("qat", args.minutes_qat, args.steps_qat, 1e-3, 20, 0.02, 0.0)
    if not (out / "fp").exists():
        run_fp(corpus, fp, out)
    if not (out / "qat").exists():
        run_qat(corpus, qat, out)
    if not (out / "model").exists():
        export(corpus, out)
    print_now(f"Done: {out / 'model'}, {(out / 'metrics.json').read_text()}")


if __name__ == "__main__":
    main()
