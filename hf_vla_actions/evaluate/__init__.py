"""How good a policy is: against demonstrations, and closed loop over any Gymnasium environment."""

from hf_vla_actions.evaluate.offline import evaluate_offline
from hf_vla_actions.evaluate.offline_report import OfflineReport
from hf_vla_actions.evaluate.rollouts import Rollout, rollouts

__all__ = ["OfflineReport", "Rollout", "evaluate_offline", "rollouts"]
