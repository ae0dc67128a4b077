"""Whether a checkpoint holds the weights of its source.

What is not quantized has to be equal. Only factors may have been folded into it: a norm divided by some, the
matrices behind it multiplied by the same; rows of one matrix divided by what the columns of the next take
back. Whoever did that, the products stay what they were, and that is looked at. One matrix and the source's
are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.hub.manifest import Manifest, find_manifest
from quantkit.model.graph import Rows, Vector
from quantkit.numerics.followed import Compared, compare_matrices, follows, goes_along
from quantkit.run.foldable import Foldable, foldable_in
from quantkit.run.folded import matrix_of
from quantkit.run.kept_check import compare_kept
from quantkit.run.verification import Difference, Verification, listed

# weights that have nothing in common are so far apart: ‖a − b‖² = ‖a‖² + ‖b‖²
_UNRELATED = 1.0
# relative: what was divided and rounded
_DIVIDED = 2.0**-6


@dataclass(frozen=True, slots=True)
class Rules:
    """What may differ.

    folds  whether factors were folded; None: not known
    cast   floats may have gone through another dtype
    """

    folds: bool | None = None
    cast: bool = True

    @classmethod
    def of(cls, manifest: Manifest | None, *, ours: bool) -> Rules:
        """What `quantkit.json` says of transforms, where it knows: not of codes that came from elsewhere."""
        if manifest is None or manifest.method == "unknown" or manifest.source.quantized is not None:
            return cls(cast=not ours)
        return cls(folds=bool(manifest.made.get("transforms", True)), cast=False)


def told_manifest(folder: Path, file: str | None = None) -> Manifest | None:
    """`quantkit.json` of a target, None where there is none that reads."""
    try:
        return find_manifest(folder, file)
    except SourceError:
        return None


@dataclass(slots=True)
class SourceCheck:
    """Is told every quantized weight by `weight`; `finish` judges. What is not quantized it reads itself, and
    first: factors of norms have to be known by then.

    quantized  names that `weight` will be told
    """

    report: Verification
    view: Checkpoint
    source: Checkpoint
    quantized: Collection[str]
    rules: Rules
    _model: Foldable = field(default_factory=Foldable)
    _unknown: str | None = None
    # what differs, and what of it was told or explained
    _changed: tuple[str, ...] = ()
    _settled: set[str] = field(default_factory=set)
    # vector → (in,) what it was divided by
    _factors: dict[str, Tensor] = field(default_factory=dict)
    # vector → matrices that do not make up for it
    _left: dict[str, list[str]] = field(default_factory=dict)
    # matrices whose rows and columns wait for one another
    _waiting: dict[str, Compared] = field(default_factory=dict)
    # matrix → how it compares; of those that take factors back, or give them, without them
    _found: dict[str, Compared] = field(default_factory=dict)
    _folded: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self._model = foldable_in(self.source)
        except (SourceError, UnsupportedError) as error:
            self._unknown = error.message
        names = [name for name in self.view.tensors if name not in self.quantized]
        pairs = [(name, twin) for name in names if (twin := self._twin(name)) is not None]
        kept = compare_kept(self.report, self.view, self.source, pairs, cast=self.rules.cast)
        self._changed = kept.changed
        self._settled.update(kept.told)
        self._tell_missing()
        for name in self._changed if self._folding else ():
            if name in self._model.vectors:
                self._divide(self._model.vectors[name])

    @property
    def _folding(self) -> bool:
        """Whether factors may be anywhere. Other tools fold none without changing a norm."""
        return bool(self.rules.folds or (self.rules.folds is None and self._changed))

    def _twin(self, name: str) -> str | None:
        """The source's tensor of this name, or that which it shares storage with."""
        twin = name if name in self.source.tensors else self._model.tied.get(name)
        return twin if twin in self.source.tensors else None

    def _tell_missing(self) -> None:
        known = self.view.tensors.keys() | self._model.dropped
        absent = [name for name in self.source.tensors if name not in known]
        if absent and self._unknown is None:
            verb = "is" if len(absent) == 1 else "are"
            self.report.problems.append(f"{listed(absent)} of the source {verb} missing")

    def _divide(self, vector: Vector) -> None:
        """Find what a vector was divided by; a problem where that is no factor."""
        wanted, found = (
            checkpoint.read(vector.name).double() + vector.offset for checkpoint in (self.source, self.view)
        )
        factors = torch.where((wanted == 0) & (found == 0), 1.0, wanted / found)
        if bool((torch.isfinite(factors) & (factors > 0)).all()):
            self._factors[vector.name] = factors
            return
        self._settled.add(vector.name)
        self.report.problems.append(
            f"`{vector.name}` differs from the source, and not by factors that are finite and positive"
        )

    # ------------------------------------------------------------------------------------------- matrices
    def weight(self, name: str, values: Tensor) -> None:
        """A quantized weight as it decodes, in the order of the checkpoint."""
        twin = self._twin(name)
        if twin is None:
            self.report.problems.append(f"`{name}` is not in the source")
        else:
            self._measure(name, values, self.source.read(twin))

    def _measure(self, name: str, values: Tensor, wanted: Tensor) -> None:
        if values.shape != wanted.shape:
            shape, other = tuple(values.shape), tuple(wanted.shape)
            self.report.problems.append(f"`{name}` is {shape}, the source has {other}")
            return
        if name not in self._model.parts:
            self._compare(name, name, values, wanted)
        for part in self._model.parts.get(name, ()):
            self._compare(name, part.key, matrix_of(part, values), matrix_of(part, wanted))

    def _compare(self, name: str, key: str, found: Tensor, wanted: Tensor) -> None:
        found, wanted = (matrix.reshape(-1, matrix.shape[-1]) for matrix in (found, wanted))
        before = self._model.before.get(key, "")
        factors = self._factors.get(before)
        makes = self._folding and key in self._model.readers
        made, exact = self._folding and key in self._model.made, name not in self.quantized
        met = compare_matrices(
            found,
            wanted,
            factors,
            by_row=makes,
            by_column=made or factors is not None,
            exact=exact and not made,
        )
        if exact and made and met.columns is not None:
            divisors = met.columns.factors()
            again = compare_matrices(found, wanted, divisors, by_row=makes, by_column=False, exact=True)
            met = replace(met, odd=again.odd)
        if factors is not None and not (met.odd == 0 if exact else _made_up(met, factors)):
            self._left.setdefault(before, []).append(key)
        self._found[key] = replace(met, rows=None, columns=None)
        if makes or made:
            self._waiting[key] = met
            self._take_back(key)

    def _measure_kept(self) -> None:
        """Floats that differ where factors may be, or that should, as a vector before them does."""
        behind = {key for name in self._factors for key in self._model.behind[name]}
        others = self._model.readers.keys() | self._model.made.keys() if self._folding else frozenset()
        for name, parts in self._model.parts.items():
            if name not in self.view.tensors or name in self.quantized or name in self._settled:
                continue
            if any(w.key in behind or (name in self._changed and w.key in others) for w in parts):
                self._measure(name, self.view.read(name), self.source.read(self._twin(name) or name))

    # -------------------------------------------------------------------------------------------- judging
    def finish(self) -> None:
        """Judge what was found."""
        self._measure_kept()
        for name, factors in self._factors.items():
            self._judge(name, factors)
        self._tell_changed()
        self._tell_unrelated()

    def _judge(self, name: str, factors: Tensor) -> None:
        """Whether all behind a vector makes up for what it was divided by; a problem where it does not."""
        bias, left = self._model.vectors[name].bias, self._left.get(name, [])
        if bias is not None:
            self._settled.add(bias)
            left += [] if self._divided(bias, factors) else [bias]
        self._settled.add(name)
        if not left:
            self._folded[name] = None
            return
        self._settled.update(_name(key) for key in left)
        does = "does" if len(left) == 1 else "do"
        self.report.problems.append(
            f"`{name}` differs from the source, and {listed(left)} {does} not make up for it"
        )

    def _divided(self, bias: str, by: Tensor) -> bool:
        """Whether a bias was divided as that which it is added to."""
        if bias not in self.view.tensors or bias not in self.source.tensors:
            return True
        found, wanted = self.view.read(bias).double(), self.source.read(bias).double() / by
        least = 1e-6 * float(wanted.abs().max()) if wanted.numel() else 0.0
        return torch.allclose(found, wanted, rtol=_DIVIDED, atol=least)

    def _bias_factors(self, rows: Rows) -> Tensor | None:
        """What the rows that make an input were multiplied by, which a bias beside them says exactly; None
        where that did not change, or by no factors."""
        if rows.bias is None or rows.bias not in self._changed:
            return None
        wanted, found = (checkpoint.read(rows.bias).double() for checkpoint in (self.source, self.view))
        factors = torch.where((wanted == 0) & (found == 0), 1.0, found / wanted)
        return factors if bool((torch.isfinite(factors) & (factors > 0)).all()) else None

    def _take_back(self, key: str) -> None:
        """Factors that a matrix takes back of the one whose rows make its input, once both were compared. A
        problem where it does not take back all."""
        for reader, rows in self._pairs(key):
            maker, met = self._waiting[rows.weight], self._waiting.pop(reader)
            if all(other in self._found for other in self._model.readers[rows.weight]):
                del self._waiting[rows.weight]
            if maker.rows is None or met.columns is None:
                continue
            source = rows.start + torch.tensor(rows.sources(met.columns.own.numel()))
            known = self._bias_factors(rows)
            own = torch.ones_like(maker.rows.own).index_copy_(
                0, source, (maker.rows.factors() if known is None else known)[source]
            )
            wanted = 1 / own[source]
            if known is None and not goes_along(met.columns, wanted):
                continue
            slack = maker.rows.slack()[source] if known is None else 0.0
            if not follows(met.columns, wanted, slack) or not follows(maker.rows, own):
                self.report.problems.append(
                    f"rows of `{rows.weight}` differ from the source's by factors, and `{reader}` does not "
                    "make up for them"
                )
            self._folded[rows.weight] = None
            self._settled.update([] if known is None or rows.bias is None else [rows.bias])
            self._found[rows.weight] = maker.without(maker.rows.distance(own))
            self._found[reader] = met.without(met.columns.distance(wanted))

    def _pairs(self, key: str) -> list[tuple[str, Rows]]:
        """Matrices of which `key` is one, or makes the input, where both wait."""
        readers = [reader for reader in (key, *self._model.readers.get(key, ())) if reader in self._waiting]
        pairs = [(reader, self._model.made[reader]) for reader in readers if reader in self._model.made]
        return [(reader, rows) for reader, rows in pairs if rows.weight in self._waiting]

    # -------------------------------------------------------------------------------------------- telling
    def _tell_changed(self) -> None:
        """What differs by nothing that is folded is wrong."""
        explained = {key for key, met in self._found.items() if self._only_factors(key, met)}
        left = [n for n in self._changed if n not in self._settled]
        wrong = [n for n in left if not all(key in explained for key in self._keys(n))]
        if self._unknown is not None and self.rules.folds is not False:
            vectors = [name for name in wrong if len(self.view.tensors[name].shape) < 2]
            wrong = [name for name in wrong if name not in vectors]
            if vectors:
                self.report.notes.append(
                    f"{listed(vectors)} {_differ(vectors)} from the source; whether factors were folded was "
                    f"not looked at: {self._unknown}"
                )
        if wrong:
            why = ", and quantkit.json names no transform" if self.rules.folds is False else ""
            self.report.problems.append(f"{listed(wrong)} {_differ(wrong)} from the source{why}")
        makers = [name for name in self._folded if name not in self._factors]
        kept = [name for name in left if name not in wrong and name not in makers]
        names = [*(name for name in self._factors if name in self._folded), *kept, *makers]
        if names:
            self.report.notes.append(
                f"{listed(names)} {_differ(names)} from the source by factors that what reads them makes up "
                "for: they may have been folded, as AWQ and SmoothQuant do"
            )

    def _keys(self, name: str) -> list[str]:
        return [part.key for part in self._model.parts.get(name, ())] or [name]

    def _only_factors(self, key: str, met: Compared) -> bool:
        """Whether floats differ by no more than what was folded into them."""
        alone = key not in self._model.readers and key not in self._model.made
        return met.odd == 0 and (alone or met.folded or met.error <= _DIVIDED)

    def _tell_unrelated(self) -> None:
        """How far quantized weights are from the source's."""
        for key, met in self._found.items():
            if _name(key) in self.quantized:
                self.report.differences.append(Difference(key, met.error))
        unrelated = [d.name for d in self.report.differences if d.error >= _UNRELATED]
        if self._unknown is not None and self._folding:
            return  # factors that are not known may be why
        if unrelated:
            has = "has" if len(unrelated) == 1 else "have"
            self.report.problems.append(f"{listed(unrelated)} {has} nothing in common with the source's")


def _made_up(met: Compared, factors: Tensor) -> bool:
    """Whether columns were multiplied by factors, which by now are divided out of them."""
    if met.columns is None:
        return True
    return not goes_along(met.columns, 1 / factors) and follows(met.columns, torch.ones_like(factors))


def _name(key: str) -> str:
    """The tensor that a matrix lies in."""
    return key.partition("[")[0]


def _differ(names: Collection[str]) -> str:
    return "differs" if len(names) == 1 else "differ"
