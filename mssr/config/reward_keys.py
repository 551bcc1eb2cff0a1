"""`reward.*`: the functions that judge a response, and how they run."""

from pydantic import Field

from mssr.config.section import Section


class RewardConfig(Section):
    format_weight: float = Field(0.0, ge=0, le=1, description="w in: reward = (1 - w) * correct + w * well-formed")
    timeout_s: float = Field(
        5.0, gt=0, description="time limit of one symbolic answer check; a check that is killed counts as wrong"
    )
    step_timeout_s: float = Field(
        300.0,
        gt=0,
        description="time limit of all symbolic answer checks of a step, per rank (validation: of 512 responses); "
        "later ones count as wrong",
    )
