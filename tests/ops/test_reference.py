"""The switch to plain references reaches every operation, and only the thread and time it is meant for."""

import threading

import pytest
import torch

from ropewalk import ops
from ropewalk.ops import references, using_references


def test_holds_inside_only_and_for_this_thread_only():
    seen = []
    with references():
        assert using_references()
        with references():
            pass
        assert using_references()
        other = threading.Thread(target=lambda: seen.append(using_references()))
        other.start()
        other.join()
    assert seen == [False]
    with pytest.raises(ValueError), references():
        raise ValueError
    assert not using_references()


def test_no_operation_uses_a_function_of_its_own():
    """What is recorded for the backward pass are torch's own operations."""
    torch.manual_seed(0)
    x = torch.randn(6, 64, requires_grad=True)
    head, labels, scored = torch.randn(9, 64), torch.arange(6), torch.ones(6, dtype=torch.bool)
    a, b = torch.randn(2, 64), torch.randn(9, 2)
    packed, in_8_bits = ops.NF4Tensor.quantize(head), ops.Int8Tensor.quantize(head)
    q = x.view(1, 6, 4, 16)
    prefix = x[:2].view(2, 4, 16), x[:2].view(2, 4, 16)
    layout = ops.AttentionLayout.rows(1, 6)
    results = {
        "rms_norm": lambda: ops.rms_norm(x, torch.ones(64), 1e-6),
        "lora_linear": lambda: ops.lora_linear(x, head, None, a, b, 1.0),
        "lora_linear on NF4": lambda: ops.lora_linear(x, packed, None, a, b, 1.0),
        "quantized_linear": lambda: torch.nn.functional.linear(x, packed),
        "quantized_linear on int8": lambda: torch.nn.functional.linear(x, in_8_bits),
        "attention": lambda: ops.attention(q, q, q, layout=layout, prefix=prefix),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, head, labels),
        "linear_logprobs": lambda: ops.linear_logprobs(x, head, labels),
        "linear_kl": lambda: ops.linear_kl(x, head, x, head, scored),
        "linear_kl_top_k": lambda: ops.linear_kl_top_k(
            x, head, labels[:, None], -labels[:, None].float(), scored
        ),
    }

    def own_functions(tensor):
        found, waiting = set(), [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None:
                found |= (
                    {node.name()} if isinstance(node, torch.autograd.function.BackwardCFunction) else set()
                )
                waiting += [following for following, _ in node.next_functions]
        return found

    for name, function in results.items():
        ours = function()
        assert own_functions(ours), name
        with references():
            plain = function()
        assert not own_functions(plain), name
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_code_runs_plainly():
    compiled_calls = []

    def backend(graph, inputs):
        compiled_calls.append(graph)
        return graph.forward

    function = torch.compile(lambda x: ops.rms_norm(torch.relu(x), torch.ones(8), 1e-6), backend=backend)
    x = torch.rand(3, 8)
    with references():
        plain = function(x)
    assert not compiled_calls
    torch.testing.assert_close(function(x), plain)
    assert compiled_calls
