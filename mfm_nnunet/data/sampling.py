"""Balanced sampling: how often the cases of a mixed corpus are drawn.

Cases of equal subject, dataset or modality (whatever is balanced) are a group; all combinations that occur are groups
of their own. Within a group every case is drawn equally often.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from mfm_nnunet.data.cases import Case
from mfm_nnunet.errors import MFMError, nearest

KINDS = ("subject", "dataset", "modality")
"""What can be balanced: fields of :class:`Case`."""
LOWEST_TEMPERATURE = 0.1
"""Below, small groups would vanish in rounding."""
Group = tuple[str, ...]


def require_legal_balance(kinds: Sequence[str], temperature: float | None, cases: Sequence[Case]) -> None:
    """Raise MFMError (E_CONFIG) when the cases cannot be balanced so."""
    for kind in kinds:
        if kind not in KINDS:
            raise MFMError("E_CONFIG", f"pretrain.balance_by={kind}: legal are {', '.join(KINDS)}. "
                                       f"{nearest(kind, KINDS)}")  # fmt: skip
        if not any(getattr(case, kind) for case in cases):
            raise MFMError(
                "E_CONFIG",
                f"pretrain.balance_by={kind}: the corpus names no {kind} of any case. Register it again from a source "
                f"that does, e.g. a CSV with the column '{kind}', or leave {kind} out.",
            )
    if temperature is not None and not kinds:
        raise MFMError(
            "E_CONFIG",
            f"pretrain.balance_temperature={temperature}: without pretrain.balance_by there is nothing to balance. Set "
            "that too, e.g. to modality.",
        )
    if temperature is not None and temperature < LOWEST_TEMPERATURE:
        raise MFMError(
            "E_CONFIG", f"pretrain.balance_temperature={temperature}: must be at least {LOWEST_TEMPERATURE}, or none."
        )


def group_shares(
    cases: Sequence[Case], kinds: Sequence[str], temperature: float | None
) -> tuple[list[Group], dict[Group, float]]:
    """The group of each case, and the share of the draws that each group gets; the shares add up to 1.

    ``temperature`` None: all groups equally; T: in proportion to (number of cases) to the power 1 / T, so 1 keeps a
    corpus as it is, and large values come near to None.
    """
    groups = [tuple(getattr(case, kind) for kind in kinds) for case in cases]
    counts = Counter(groups)
    exponent = 0.0 if temperature is None else 1 / temperature
    largest = max(counts.values())  # powers of ratios neither overflow nor vanish altogether
    powers = {group: (count / largest) ** exponent for group, count in sorted(counts.items())}
    total = sum(powers.values())
    return groups, {group: power / total for group, power in powers.items()}


def case_weights(cases: Sequence[Case], kinds: Sequence[str], temperature: float | None) -> dict[str, float]:
    """The probability of each case by name; they add up to 1."""
    groups, shares = group_shares(cases, kinds, temperature)
    counts = Counter(groups)
    return {case.name: shares[group] / counts[group] for case, group in zip(cases, groups)}


def describe_shares(cases: Sequence[Case], kinds: Sequence[str], temperature: float | None) -> str:
    """One line with the shares of modalities and datasets, the twenty largest by name; subjects are not named."""
    _, shares = group_shares(cases, kinds, temperature)
    merged: defaultdict[str, float] = defaultdict(float)
    for group, share in shares.items():
        words = [word or f"unknown {kind}" for kind, word in zip(kinds, group) if kind != "subject"]
        merged[" ".join(words)] += share
    largest = sorted(merged.items(), key=lambda item: -item[1])[:20]
    listed = ", ".join(f"{name} {share:.1%}" for name, share in largest if name)
    listed = listed or f"{min(shares.values()):.2%} to {max(shares.values()):.2%} each"
    rest = f", {len(merged) - 20} more" if len(merged) > 20 else ""
    return f"balanced by {' and '.join(kinds)}, {len(shares)} groups: {listed}{rest}"
