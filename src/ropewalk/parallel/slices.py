"""Which parameters a `tensor` group divides, told by their names."""

FIRST = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
SECOND = ("o_proj", "down_proj")
VOCABULARY = ("embed.weight", "head.weight")


def sliced_along(name: str) -> int | None:
    """The dimension along which a parameter is divided; None: every process has all of it."""
    if name in VOCABULARY:
        return 0
    *modules, kind = name.split(".")
    if any(module in FIRST for module in modules):
        return None if kind == "lora_a" else 0
    if any(module in SECOND for module in modules):
        return {"weight": 1, "lora_a": 1}.get(kind)
    return None


def has_partial_gradient(name: str) -> bool:
    """Whether each process makes a part of the gradient of a parameter that all have: to be added up.

    Adapters' halves that meet slices, and norms: of some heads, or of the tokens that a process has.
    """
    *modules, kind = name.split(".")
    if any(module in FIRST for module in modules):
        return kind == "lora_a"
    if any(module in SECOND for module in modules):
        return kind == "lora_b"
    return any(module.endswith("norm") for module in modules)
