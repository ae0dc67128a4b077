from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Target


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("gptq:w4g128", [{"format": "gptq", "scheme": "w4g128"}]),
        ("GPTQ:W4G128", [{"format": "gptq", "scheme": "w4g128"}]),
        ("gptq", [{"format": "gptq"}]),
        ("ct:w8", [{"format": "compressed_tensors", "scheme": "w8"}]),
        ("gptq:w4g128, w8g128", [{"format": "gptq"}, {"format": "gptq", "scheme": "w8g128"}]),
        ("gptq@method=rtn", [{"format": "gptq", "method": "rtn"}]),
        ("gptq@method=RTN,scales=mse", [{"format": "gptq", "method": "rtn", "options": {"scales": "mse"}}]),
        (
            "gptq:w4g128@damp=0.05,act_order=static",
            [{"format": "gptq", "options": {"damp": 0.05, "act_order": "static"}}],
        ),
        (
            "gptq@damp=1e-3,batch_columns=64,plain=true,limit=null",
            [
                {
                    "format": "gptq",
                    "options": {"damp": 0.001, "batch_columns": 64, "plain": True, "limit": None},
                }
            ],
        ),
        ("gptq@feedback=true", [{"format": "gptq", "feedback": True}]),
        ("gptq@name=mine", [{"format": "gptq", "name": "mine"}]),
    ],
)
def test_reads(text: str, targets: list[dict[str, Any]]) -> None:
    assert parse_targets(text) == tuple(Target(**target) for target in targets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a target"),
        (":w4", "is not a target"),
        ("gptq:", "is not a target"),
        ("gptq:w4,", "is not a target"),
        ("gptq@", "is not a target"),
        ("gptqq", "unknown format 'gptqq'; did you mean 'gptq'?"),
        ("gptq:w4g1288x", "unknown scheme 'w4g1288x'; did you mean 'w4g128'?"),
        ("gptq@damp", "'damp' is not key=value"),
        ("gptq@damp=1,damp=2", "damp: given twice"),
        ("gptq@dampp=1", "'gptq' has no parameter 'dampp'; did you mean 'damp'?"),
        ("gptq@methd=rtn", "did you mean 'method'?"),
        ("gptq@damp=much", "damp: must be a number, not 'much'"),
        ("gptq@damp=-1", "damp must be positive"),
        ("gptq@plain=yes", "must be true or false, not 'yes'"),
        ("gptq@batch_columns=1_0", "must be an integer, not '1_0'"),
        ("gptq@act_order=all", "must be 'none' or 'static', not 'all'"),
        ("gptq@method=gptk", "unknown method 'gptk'; did you mean 'gptq'?"),
        ("gptq:w4,w8@name=x", "cannot be the name of 2 targets"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_targets(text)
    assert message in caught.value.message
    assert repr(text) in caught.value.message


def test_an_unusual_group_size_is_for_the_format_to_refuse() -> None:
    assert parse_targets("gptq:w4g12")[0].scheme == "w4g12"
