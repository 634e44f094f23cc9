"""How good a policy is: closed loop over any Gymnasium environment."""

from hf_vla_actions.evaluate.rollouts import Rollout, rollouts

__all__ = ["Rollout", "rollouts"]
