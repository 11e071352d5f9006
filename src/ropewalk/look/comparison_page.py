"""What `compare` found as one page that needs nothing else."""

from collections.abc import Mapping
from typing import Any

from ropewalk.look.figures import number
from ropewalk.look.html import render


def comparison_page(account: Mapping[str, Any]) -> str:
    a, b = account["a"]["sources"], account["b"]["sources"]
    none = {"kept": 0, "tokens": 0}
    sources = [(name, a.get(name, none), b.get(name, none)) for name in dict.fromkeys([*a, *b])]
    return render(
        "comparison.html",
        title="Two versions of data",
        account=account,
        headline=headline(account),
        sources=sources,
    )


def headline(account: Mapping[str, Any]) -> str:
    """One sentence of what changed."""
    only = [account[name] for name in ("only_a", "only_b")]
    return (
        f"{number(account['common']['documents'])} documents are in both; {number(only[0]['documents'])} "
        f"({number(only[0]['tokens'])} tokens) only in A, {number(only[1]['documents'])} "
        f"({number(only[1]['tokens'])} tokens) only in B."
    )
