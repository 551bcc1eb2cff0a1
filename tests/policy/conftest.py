from policy_fixtures import *  # noqa: F403
