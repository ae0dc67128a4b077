from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Target, TransformSpec


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
        ("nf4", [{"format": "bitsandbytes", "scheme": "nf4"}]),
        ("NF4@method=rtn", [{"format": "bitsandbytes", "scheme": "nf4", "method": "rtn"}]),
        ("nf4@method=search,damp=0.1",
         [{"format": "bitsandbytes", "scheme": "nf4", "method": "gptq", "options": {"damp": 0.1}}]),
        ("bnb:nf4,int8", [{"format": "bitsandbytes", "scheme": s} for s in ("nf4", "w8a8_mixed")]),
        ("int8", [{"format": "bitsandbytes", "scheme": "w8a8_mixed"}]),
        ("fp8@kv_cache=FP8", [{"format": "ct", "scheme": "fp8a8", "kv_cache": "fp8"}]),
        ("fp8@kv_cache=null", [{"format": "ct", "scheme": "fp8a8"}]),
        ("w8a8@transforms=smoothquant",
         [{"format": "ct", "scheme": "w8a8", "transforms": [("smoothquant", {})]}]),
        ("ct:w8a8@transforms=SmoothQuant,alpha=0.8,search=false,scales=mse",
         [{"format": "ct", "scheme": "w8a8", "options": {"scales": "mse"},
           "transforms": [("smoothquant", {"alpha": 0.8, "search": False})]}]),
        ("ct:w8a8@transforms=awq,damp=0.2",
         [{"format": "ct", "scheme": "w8a8", "transforms": [("awq", {"damp": 0.2})]}]),
    ],
)  # fmt: skip
def test_reads(text: str, targets: list[dict[str, Any]]) -> None:
    for target in targets:
        target["transforms"] = tuple(TransformSpec(*spec) for spec in target.get("transforms", ()))
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
        ("nf4:nf4_dq", "'nf4' stands for bitsandbytes:nf4 and takes no scheme (write bitsandbytes:nf4_dq)"),
        ("fp8_block", "'fp8_block' is a scheme, write FORMAT:fp8_block"),
        ("int88", "unknown format 'int88'; did you mean 'int8'?"),
        ("bnb:int88", "unknown scheme 'int88'; did you mean 'int8'?"),
        ("gptq@kv_cache=fp16", "must be 'fp8' or 'int8' or null, not 'fp16'"),
        ("gptq@kv_cach=fp8", "did you mean 'kv_cache'?"),
        ("gptq@transform=awq", "did you mean 'transforms'?"),
        ("gptq@transforms=smothquant", "unknown transform 'smothquant'; did you mean 'smoothquant'?"),
        ("gptq@transforms=", "unknown transform ''"),
        ("w8a8@transforms=smoothquant,alpa=1",
         "neither 'rtn' nor 'smoothquant' has a parameter 'alpa'; did you mean 'alpha'?"),
        ("w8a8@transforms=smoothquant,alpha=much", "alpha: must be a number or null, not 'much'"),
        ("w8a8@transforms=smoothquant,alpha=2", "alpha must be at most 1, not 2"),
        ("gptq@transforms=awq,damp=0.1",
         "damp: a parameter of both 'gptq' and 'awq' (write {awq: {damp: 0.1}} in a recipe)"),
        ("w8a8@alpha=0.8", "'rtn' has no parameter 'alpha'"),
    ],
)  # fmt: skip
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_targets(text)
    assert message in caught.value.message
    assert repr(text) in caught.value.message


def test_an_unusual_group_size_is_for_the_format_to_refuse() -> None:
    assert parse_targets("gptq:w4g12")[0].scheme == "w4g12"
