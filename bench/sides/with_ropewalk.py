"""Ropewalk's side: `ropewalk.train` on the job's recipe, the same loop that every user runs."""

import json
from contextlib import nullcontext

import torch
from common import read_job, report

import ropewalk as rw
from ropewalk.ops import references
from ropewalk.train import loop
from ropewalk.train.job import Job


def main() -> None:
    job = read_job()
    ballast = torch.empty(job.get("ballast_bytes", 0), dtype=torch.uint8, device=job["device"])
    if not job.get("save", True):
        loop.checkpoint = lambda *_, **__: None
        Job.check_room = lambda *_: None
    with references() if job.get("plain") else nullcontext():  # plain: operations by their references
        result = rw.train(job["recipe"], progress=False)
    records = [json.loads(line) for line in (result.run / "metrics-train.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    start = next(record for record in records if record["kind"] == "start")
    report(
        job,
        ("ropewalk", "transformers", "torchao"),
        seconds=[record["seconds"] for record in steps],
        tokens=[record["tokens"] for record in steps],
        scored_tokens=[record["scored_tokens"] for record in steps],
        losses=[record["loss"] for record in steps],
        gradient_norms=[record["gradient_norm"] for record in steps],
        flops=[record["flops_per_second"] * record["seconds"] for record in steps],
        trainable=start["trainable"],
        ballast_bytes=len(ballast),
        settings={name: job["recipe"].get(name, {}) for name in ("adapt", "train")},
    )


if __name__ == "__main__":
    main()
