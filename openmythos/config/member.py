"""What every member of a seam has beside its fields. No torch."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable  # the tests check arguments
class Whole(Protocol):
    """What the members read of the ``ModelConfig`` that they are parts of."""

    @property
    def d_model(self) -> int:
        """Width of the state."""

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own."""

    @property
    def attention(self) -> Any:
        """The attention's config."""

    @property
    def state_init(self) -> Any:
        """The initial state's config."""


class Member:
    """A part of the model's config; a member of a seam with several carries its ``kind``."""

    def check(self, model: Whole) -> None:
        """Refuse a model that this does not fit; most members fit every one.

        Raises:
            ValueError: Names the field that does not fit.
        """
