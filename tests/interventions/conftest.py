"""The fixture that runs a test once for each architecture family."""

from ..families.conftest import family as family
