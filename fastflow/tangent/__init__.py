"""Derivatives of a network along a direction, next to its value: `value_and_jvp`.

    value, tangent = value_and_jvp(f, (x, t), (dx, dt))      tangent = df/dx dx + df/dt dt

The value has its ordinary autograd graph and the tangent has none, as every method wants it that
regresses on a tangent (MeanFlow, sCM). How the tangent is taken is a part, the engine:

| engine | exact | for |
|---|---|---|
| `Pairs` | yes | networks of this project: one pass, the memory of an ordinary step |
| `DualNumbers` | yes | any network that torch differentiates in forward mode: two passes |
| `FunctionalJVP` | yes | the reference: one pass of `torch.func.jvp`, the most memory |
| `FiniteDifference` | no | networks that nothing else takes, e.g. compiled ones |
"""

from fastflow.tangent.engines import (
    DualNumbers,
    FiniteDifference,
    FunctionalJVP,
    Pairs,
    TangentEngine,
    value_and_jvp,
)

__all__ = [
    "DualNumbers",
    "FiniteDifference",
    "FunctionalJVP",
    "Pairs",
    "TangentEngine",
    "value_and_jvp",
]
