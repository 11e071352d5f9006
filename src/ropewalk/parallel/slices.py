"""Which parameters a `tensor` group divides, told by their names; and which models it can divide."""

import math

from ropewalk.model.config import ModelConfig

FIRST = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
SECOND = ("o_proj", "down_proj")
VOCABULARY = ("embed.weight", "head.weight")


def is_expert(name: str) -> bool:
    """Whether a parameter is one of the experts of a mixture."""
    return "experts" in name.split(".")


def sliced_along(name: str) -> int | None:
    """The dimension along which a parameter is divided; None: every process has all of it."""
    if name in VOCABULARY:
        return 0
    if is_expert(name):
        return None
    *modules, kind = name.split(".")
    if any(module in FIRST for module in modules):
        return None if kind == "lora_a" else 0
    if any(module in SECOND for module in modules):
        return {"weight": 1, "lora_a": 1}.get(kind)
    return None


def has_partial_gradient(name: str) -> bool:
    """Whether each process makes a part of the gradient of a parameter that all have: to be added up.

    Adapters' halves that meet slices, and what is not divided: norms (of some heads, or of the tokens that a
    process has), routers and experts.
    """
    *modules, kind = name.split(".")
    if is_expert(name) or "router" in modules:
        return True
    if any(module in FIRST for module in modules):
        return kind == "lora_a"
    if any(module in SECOND for module in modules):
        return kind == "lora_b"
    return any(module.endswith("norm") for module in modules)


def refusal(config: ModelConfig, degree: int) -> str | None:
    """Why `degree` processes cannot share this model's products, and the nearest degree that can; or None."""
    if degree == 1:
        return None
    if config.qk_norm == "projection":
        return f"{config.family} normalizes all heads together; set parallel.tensor: 1"
    names = ["num_attention_heads", "num_key_value_heads", "vocab_size"]
    if len(config.moe_layers) < config.num_hidden_layers:  # experts are not sliced
        names.insert(2, "intermediate_size")
    sizes = {name: getattr(config, name) for name in names}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % degree]
    if not odd:
        return None
    common = math.gcd(*sizes.values())
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    fits = min(divisors, key=lambda d: (abs(d - degree), -d))
    return f"{degree} does not divide {' and '.join(odd)}; set parallel.tensor: {fits}"
