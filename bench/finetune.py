"""dit-digits fine-tuned on scikit-learn's digits: SaRA, LoRA of as many parameters, DiffFit, the
whole network; quality before and after, time and memory, for several seeds.

    python bench/finetune.py --seeds 3 --csv bench/results/finetune.csv
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fastdiff.finetune import Recipe, finetune

METHODS = ("sara", "lora", "difffit", "full")
FACTS = (
    "trained_parameters steps seconds_a_step loss_first loss_last gradient_bytes moment_bytes "
    "peak_bytes file_bytes"
).split()
QUALITY = ("agreement", "frechet_to_held_out")


def one(args: argparse.Namespace, method: str, seed: int) -> list[object]:
    """A row; in a process of its own, whose peak of memory is that of this training."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        card = finetune(
            args.model,
            Path(folder) / f"{method}.safetensors",
            Recipe(
                data=args.data, method=method, seed=seed, steps=args.steps, batch=args.batch
            ),
            evaluate=dict(per_class=args.per_class, steps=args.sampling_steps, seed=seed),
        )  # fmt: skip
    quality = [card[w][name] for name in QUALITY for w in ("before", "after")]
    return [method, seed, args.threads, *(card[fact] for fact in FACTS), *quality]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", default="dit-digits")
    p.add_argument("--data", default="sklearn")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=240)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--per-class", type=int, default=20, help="samples that are read")
    p.add_argument("--sampling-steps", type=int, default=15)
    p.add_argument("--csv", type=Path, required=True)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args()
    names = [f"{name}_{when}" for name in QUALITY for when in ("before", "after")]
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with args.csv.open("w", newline="") as file, pool:
        out = csv.writer(file)
        out.writerow(["method", "seed", "threads", *FACTS, *names])
        for seed in range(args.seeds):
            for method in METHODS:
                row = pool.submit(one, args, method, seed).result()
                out.writerow(row)
                file.flush()
                print(*row, flush=True)


if __name__ == "__main__":
    main()
