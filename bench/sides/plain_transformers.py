"""The foot of the ladder: a training loop as one writes it with transformers and nothing else.

float32 weights, batches padded to their longest document, the model's own loss on full logits, fused AdamW,
gradients clipped at 1.
"""

import torch
from common import Clock, examples, read_job, report
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM


def main() -> None:
    job = read_job()
    device = job["device"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0, fused=True)
    rows = examples(job["examples"])
    values = {"tokens": [], "scored_tokens": [], "losses": [], "gradient_norms": []}
    clock = Clock(device)
    clock.tick()
    for step in range(job["steps"]):
        batch = [rows[(step * job["batch_size"] + i) % len(rows)] for i in range(job["batch_size"])]
        scored = sum(label != -100 for row in batch for label in row["labels"])
        total = 0.0
        for at in range(0, len(batch), job["micro_batch_size"]):
            part = batch[at : at + job["micro_batch_size"]]
            tokens = pad_sequence([torch.tensor(row["tokens"]) for row in part], batch_first=True)
            labels = pad_sequence([torch.tensor(row["labels"]) for row in part], True, -100)
            mask = pad_sequence([torch.ones(len(row["tokens"]), dtype=torch.int64) for row in part], True)
            share = int((labels != -100).sum()) / scored
            inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
            loss = model(**{name: value.to(device) for name, value in inputs.items()}).loss * share
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values["tokens"].append(sum(len(row["tokens"]) for row in batch))
        values["scored_tokens"].append(scored)
        values["losses"].append(total)
        values["gradient_norms"].append(norm.item())
        clock.tick()
    trainable = sum(p.numel() for p in model.parameters())
    report(job, ("transformers",), seconds=clock.seconds, trainable=trainable, **values)


if __name__ == "__main__":
    main()
