"""A plain PyTorch pretraining loop in the manner of nanoGPT, on a model of the job's shape.

As there: float32 weights, bfloat16 autocast, full logits into F.cross_entropy, fused AdamW, gradients
clipped at 1, the whole model compiled by default. Unlike there the blocks are Llama's (RMSNorm, rotary
positions, SwiGLU), so that all sides train the same function. (On a CPU nanoGPT itself would neither
compile nor use bfloat16 nor the fused optimizer: this peer is the stronger one.)
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Clock, read_job, report
from torch import Tensor, nn
from torch.nn import functional as F


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, seq, head_dim]; halves rotated as one complex number."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["hidden_size"] // self.heads
        self.qkv = nn.Linear(
            config["hidden_size"], (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.proj = nn.Linear(config["hidden_size"], config["hidden_size"], bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        heads = self.qkv(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.proj(y.transpose(1, 2).reshape(batch, seq, -1))


class Block(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.norm_1, self.norm_2 = (nn.RMSNorm(hidden, eps=config["rms_norm_eps"]) for _ in range(2))
        self.attention = Attention(config)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), cos, sin)
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, config: dict[str, Any], length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        self.head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config["tie_word_embeddings"]:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        size = self.blocks[0].attention.head_dim
        rates = config["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(length).float(), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def main() -> None:
    job = read_job()
    config = json.loads(Path(job["model"], "config.json").read_text())
    data = np.load(job["stream"], mmap_mode="r")
    device, length, rows = job["device"], job["sequence_length"], job["micro_batch_size"]
    micro = job["batch_size"] // rows
    model = Model(config, length).to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=job["learning_rate"],
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model) if job["settings"]["compile"] else model
    generator = torch.Generator().manual_seed(job["seed"])

    def batch() -> tuple[Tensor, Tensor]:
        at = torch.randint(len(data) - length, (rows,), generator=generator).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in at])
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    clock, losses = Clock(device), []
    clock.tick()
    for _ in range(job["steps"]):
        total = 0.0
        for _ in range(micro):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = forward(*batch()) / micro
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        clock.tick()
    tokens = [job["batch_size"] * length] * job["steps"]
    report(
        job,
        (),
        seconds=clock.seconds,
        tokens=tokens,
        scored_tokens=tokens,
        losses=losses,
        trainable=sum(p.numel() for p in model.parameters()),
        settings=job["settings"] | {"weights": "float32", "autocast": "bfloat16", "optimizer": "AdamW fused"},
    )


if __name__ == "__main__":
    main()
