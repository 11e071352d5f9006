"""What cannot go together is refused before anything is loaded, with the reason and the way out."""

import pytest

from ropewalk.errors import UserError
from ropewalk.recipe import Recipe, resolve
from ropewalk.recipe.machine import Machine

GPU = Machine(cores=4, cpu_bfloat16=True, gpu=True, gpu_bfloat16=True)
CPU = Machine(cores=4, cpu_bfloat16=True)


def recipe(adapt=None, optimizer=None, model=None, parallel=None, data=None, **train):
    fields = {"steps": 10, "batch_size": 4, "micro_batch_size": 4, "clip": 0.0, **train}
    return Recipe.model_validate(
        {
            "name": "pairs",
            "model": model or {"source": "somewhere"},
            "data": {"train": [{"path": "x.jsonl"}], **(data or {})},
            "adapt": adapt or {},
            "train": {**fields, "optimizer": optimizer or {}},
            "parallel": parallel or {},
        }
    )


PIPELINE, ZBV = {"pipeline": 2}, {"pipeline": 2, "pipeline_schedule": "zbv"}
MICRO: dict[str, int] = {"micro_batch_size": 1}
SCRATCH = {"config": {"model_type": "llama"}, "tokenizer": "somewhere"}
REFUSED = [
    (dict(data={"packing": "concat", "too_long": "drop"}), "data.too_long", "data.packing: best_fit"),
    (dict(optimizer={"in_backward": True}, clip=1.0), "train.optimizer.in_backward", "train.clip: 0"),
    (dict(optimizer={"in_backward": True}, micro_batch_size=2), "in_backward", "train.micro_batch_size: 4"),
    (dict(optimizer={"in_backward": True, "offload": True}), "in_backward", "one of the two"),
    (dict(optimizer={"name": "muon", "state_bits": 8}), "state_bits", "orthogonal"),
    (dict(optimizer={"name": "adafactor", "state_bits": 4}), "state_bits", "small already"),
    (dict(optimizer={"masters": False}, precision="float32"), "masters", "bfloat16"),
    (dict(checkpointing_budget=0.5, checkpointing="full"), "checkpointing_budget", "leave out"),
    (dict(checkpointing_every=2), "checkpointing_every", "train.checkpointing: full"),
    (dict(activation_offload=True), "activation_offload", "train.checkpointing: full"),
    (dict(compile=True, checkpointing="selective", checkpointing_every=2), "train.compile", "for all"),
    (dict(compile=True, checkpointing_budget=0.5), "train.compile", "none, selective or full"),
    (dict(cuda_graphs=True), "cuda_graphs", "train.compile: true"),
    (dict(precision="float8"), "train.precision", "8.9"),
    (dict(adapt={"quantize": "nf4"}), "adapt.quantize", "adapt.method: lora"),
    (dict(adapt={"method": "bitfit", "quantize": "int8"}), "adapt.quantize", "adapt.method: lora"),
    (dict(adapt={"method": "lora", "freeze": ["embed.*"]}), "adapt.freeze", "leave it out"),
    (dict(adapt={"method": "ia3", "b_rate": 16}), "adapt.b_rate", "adapt.method: lora"),
    (dict(adapt={"method": "prefix", "rank_stabilized": True}), "rank_stabilized", "adapt.method: lora"),
    (dict(adapt={"method": "prompt"}, parallel={"context": 2}), "adapt.method", "parallel.context: 1"),
    (dict(optimizer={"name": "muon"}, parallel={"context": 2}), "train.optimizer.name", "parallel.context"),
    (dict(parallel={"context": 3}), "parallel.context", "set it to 2, or data.sequence_length: 1026"),
    (dict(parallel={"context": 3, "tensor": 2}), "parallel.context", "12 equal pieces"),
    # absurd degrees are answered at once, too
    (dict(parallel={"context": 10**10}), "parallel.context", "set it to 512, or"),
    (dict(parallel={"pipeline": 10**10}, micro_batch_size=1), "processes", "set parallel.pipeline: 4"),
    (dict(parallel={"context": 2, "expert": 2}, compile=True), "train.compile", "parallel.expert"),
    (dict(adapt={"method": "lora"}, model=SCRATCH), "adapt.method", "model.source"),
    (dict(parallel={"pipeline": 2}), "train.micro_batch_size", "set it to 2, or parallel.pipeline: 1"),
    (dict(parallel={"pipeline": 3}, micro_batch_size=2), "micro-batches of 2", "set it to 1"),
    (dict(parallel={"pipeline": 8}, micro_batch_size=1), "8 processes", "set parallel.pipeline: 4"),
    (
        dict(
            parallel={"pipeline": 2, "pipeline_schedule": "interleaved-1f1b"},
            micro_batch_size=1,
            batch_size=5,
        ),
        "rounds of equal length",
        "set it to 5",
    ),
    (dict(parallel=PIPELINE | {"pipeline_stages": 2}, **MICRO), "pipeline_stages", "interleaved-1f1b"),
    (dict(parallel=ZBV | {"pipeline_stages": 3}, **MICRO), "pipeline_stages", "interleaved-zb"),
    (dict(parallel=PIPELINE, optimizer={"in_backward": True}), "in_backward", "parallel.pipeline: 1"),
    (dict(parallel=PIPELINE, adapt={"method": "prefix"}, **MICRO), "adapt.method", "parallel.pipeline: 1"),
    (
        dict(parallel=PIPELINE, checkpointing="full", activation_offload=True, **MICRO),
        "activation_offload",
        "set it to false",
    ),
    (dict(parallel=ZBV, checkpointing="selective", **MICRO), "train.checkpointing", "checkpointing: full"),
    (
        dict(parallel=ZBV, checkpointing_budget=0.5, **MICRO),
        "checkpointing_budget",
        "pipeline_schedule: 1f1b",
    ),
    (dict(parallel=ZBV, compile=True, **MICRO), "train.compile", "pipeline_schedule: 1f1b"),
    (dict(parallel=ZBV | {"shard": 2}, micro_batch_size=1), "parallel.stage", "set it to 1"),
]


@pytest.mark.parametrize(("fields", "where", "way_out"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_pair_is_refused_with_the_reason_and_the_way_out(fields, where, way_out):
    with pytest.raises(UserError) as caught:
        resolve(recipe(**fields), machine=CPU)
    assert where in str(caught.value)
    assert way_out in str(caught.value)


ACCEPTED = [
    dict(data={"packing": "concat", "temperature": 2.0, "curriculum": "length"}),
    dict(adapt={"method": "lora", "quantize": "nf4", "b_rate": 16, "rank_stabilized": True}, clip=1.0),
    dict(optimizer={"in_backward": True, "masters": False, "state_bits": 8}),
    dict(optimizer={"offload": True, "name": "muon"}, clip=1.0, micro_batch_size=1),
    dict(checkpointing="full", checkpointing_every=2, activation_offload=True, compile=True),
    dict(checkpointing_budget=0.3, optimizer={"name": "lion", "state_bits": 4}),
    dict(adapt={"freeze": ["embed.*"]}, checkpointing="selective"),
    dict(parallel=PIPELINE, optimizer={"name": "muon", "offload": True}, compile=True, **MICRO),
    dict(parallel=ZBV | {"shard": 2, "stage": 1}, checkpointing="full", batch_size=8, **MICRO),
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda value: str(value)[:60])
def test_what_goes_together_is_accepted(fields):
    resolve(recipe(**fields), machine=CPU)


def test_all_refusals_come_at_once():
    with pytest.raises(UserError, match=r"in_backward.*checkpointing_every"):
        resolve(recipe(optimizer={"in_backward": True}, clip=1.0, checkpointing_every=3), machine=CPU)


def test_a_gpu_may_have_float8_and_graphs():
    resolve(recipe(precision="float8", compile=True, cuda_graphs=True), machine=GPU)


def test_float8_wants_a_multiple_of_16_tokens():
    whole = recipe(precision="float8", micro_batch_size=2, batch_size=4)
    odd = whole.model_copy(update={"data": whole.data.model_copy(update={"sequence_length": 100})})
    with pytest.raises(UserError, match="multiple of 16"):
        resolve(odd, machine=GPU)


@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", (0.9, 0.95)), ("lion", (0.9, 0.99)), ("muon", (0.95, 0.95))]
)
def test_betas_and_rates_follow_the_optimizer(name, expected):
    optimizer = resolve(recipe(optimizer={"name": name}), machine=CPU).recipe.train.optimizer
    assert (optimizer.beta1, optimizer.beta2) == expected
    plain = resolve(recipe(), machine=CPU).recipe.train.optimizer.learning_rate
    assert optimizer.learning_rate == pytest.approx(plain * (0.2 if name == "lion" else 1.0))
