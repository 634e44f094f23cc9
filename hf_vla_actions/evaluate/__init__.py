"""How good a policy is: against demonstrations, and closed loop over any Gymnasium environment."""

from hf_vla_actions.evaluate.rollouts import Rollout, rollouts

__all__ = ["Rollout", "rollouts"]
