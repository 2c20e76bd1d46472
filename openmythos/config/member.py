"""What all members of seams (see ``openmythos.config``) have in common. No torch."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable  # the tests check arguments
class Whole(Protocol):
    """The part of ``ModelConfig`` that its members may read in ``check``."""

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
    """A part of the model's config. If its seam has several members, it has a ``kind``."""

    def check(self, model: Whole) -> None:
        """Check that this member fits the rest of the model; by default it always does.

        Raises:
            ValueError: Names the field that does not fit.
        """
