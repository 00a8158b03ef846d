"""Door through which nnU-Net finds our experiment planner."""

from nnunetv2_hiendmae.nnunet.planner import HiEndMAEPlanner

__all__ = ["HiEndMAEPlanner"]
