"""Quality of the shipped digit networks as JSON; ``--train-classifier`` makes what reads them.

python bench/quality.py dit-digits unet-digits dit-scenes --per-class 100
"""

from __future__ import annotations

import argparse
import json

from fastdiff import keep_memory, models, quality


def main() -> None:
    """Evaluate each named checkpoint with its card's sampler, steps and guidance."""
    keep_memory()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("names", nargs="*", default=["dit-digits", "unet-digits"], help="names or paths")
    p.add_argument("--per-class", type=int, default=100)
    p.add_argument("--steps", type=int, help="default: the card's")
    p.add_argument("--guidance", type=float, help="default: the card's")
    p.add_argument("--clip", type=float, help="default: the card's")
    p.add_argument("--sampler", help="default: the card's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--train-classifier", action="store_true", help="train it, in place of evaluating"
    )
    args = p.parse_args()
    if args.train_classifier:
        print(json.dumps(quality.train_classifier(), indent=1))
        return
    for name in args.names:
        model, card = models.load(name)
        options = {
            key: card.get(key) if getattr(args, key) is None else getattr(args, key)
            for key in ("sampler", "steps", "guidance", "clip")
        }
        if getattr(model, "box_size", 0):
            result = quality.evaluate_scenes(
                model, count=2 * args.per_class, seed=args.seed, **options
            )
        else:
            result = quality.evaluate(model, per_class=args.per_class, seed=args.seed, **options)
        print(
            json.dumps({"model": name, "parameters": card["parameters"], **result}, indent=1),
            flush=True,
        )


if __name__ == "__main__":
    main()
