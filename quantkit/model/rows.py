"""Which rows of another weight an input may come from: up → down, v → o, and the same inside fused weights.

Guesses from roles and shapes, in reading order of what models do. A guess costs a proof and can do no harm:
`run.fold` uses none that real activations do not confirm.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.model.graph import Role, Rows, Weight

# the roles that may make the input of a role, the likelier first
_MAKERS: Mapping[Role, tuple[Role, ...]] = {"down": ("up", "gate_up"), "o": ("v", "qkv")}


def propose_rows(
    weight: Weight,
    others: Mapping[str, Weight],
    vectors: Mapping[str, tuple[int, ...]],
    heads: tuple[int, int] | None,
) -> Rows | None:
    """Where the input of `weight` may come from; None where names and shapes suggest nothing.

    others   weights of the block by key
    vectors  shapes of the tensors beside them by checkpoint name, where biases are found
    heads    (heads, width of a head) of the input, None when it is not made of heads
    """
    beside = [w for w in others.values() if _place(w) == _place(weight)]
    for role in _MAKERS.get(weight.role, ()):
        makers = [w for w in beside if w.role == role]
        if len(makers) == 1:
            found = _fitted(makers[0], weight.shape[1], heads)
            if found is not None:
                return _biased(found, makers[0], vectors)
    return None


def _place(weight: Weight) -> tuple[str, int | None]:
    """The module that holds it, and the expert."""
    path = weight.name.removesuffix(".weight").rpartition(".")[0]
    return path, None if weight.part is None else weight.part.expert


def _fitted(maker: Weight, width: int, heads: tuple[int, int] | None) -> Rows | None:
    """The last rows of `maker` that `width` channels can be made from."""
    rows = maker.shape[0]
    if maker.role == "gate_up":
        return Rows(maker.key, width) if rows == 2 * width else None
    if maker.role != "qkv" and rows == width:
        return Rows(maker.key)
    if maker.role == "up" or heads is None:
        return None
    count, span = heads
    # queries, keys and values lie one after another: (heads + 2 · shared) · span rows
    made, rest = divmod(rows if maker.role == "v" else rows - count * span, span)
    shared = made if maker.role == "v" else made // 2
    if rest or shared < 1 or count % shared or (maker.role == "qkv" and made % 2):
        return None
    plain = count == shared
    return Rows(maker.key, rows - shared * span, repeat=count // shared, span=1 if plain else span)


def _biased(rows: Rows, maker: Weight, vectors: Mapping[str, tuple[int, ...]]) -> Rows:
    """With the bias of the weight, where it has one: as long as it has rows."""
    name = f"{maker.name.removesuffix('.weight')}.bias"
    found = vectors.get(name) == maker.shape[:1]
    return Rows(rows.weight, rows.start, name if found else None, rows.repeat, rows.span)
