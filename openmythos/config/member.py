"""What every member of a seam has beside its fields. No torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmythos.config.model import ModelConfig


class Member:
    """A part of the model's config; a member of a seam with several carries its ``kind``."""

    def check(self, model: "ModelConfig") -> None:
        """Refuse a model that this does not fit; most members fit every one.

        Raises:
            ValueError: Names the field that does not fit.
        """
