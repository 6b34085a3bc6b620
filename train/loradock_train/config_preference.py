"""The `preference` section: learning from pairs of answers, of which one was preferred (DPO).

Knows keys, units, defaults and bounds; preference.py trains.
"""

from typing import Literal

from pydantic import Field

from loradock_train.config_sections import Section


class PreferenceOptions(Section):
    """Direct preference optimisation. Needs TRL: `pip install 'loradock[preference]'`."""

    beta: float = Field(default=0.1, gt=0, le=2)
    """How strongly the model is held to the base it began as. Default 0.1, above 0 up to 2."""

    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair: DPO's own (sigmoid), a hinge, or IPO's square. Default sigmoid."""
