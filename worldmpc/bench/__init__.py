"""How fast planning and updating are, beside what this machine's matrix products alone allow.

Speed by itself says little: it is the machine's as much as the code's. So the matrix products that the algorithm cannot do
without are timed in the same process, in turns with the code, and the share of time that they explain is the result.
"""

from __future__ import annotations

from worldmpc.bench.limits import LaunchFloor, Limit
from worldmpc.bench.measure import bench, check, measure_environment, measure_training, record, synthetic_batch
from worldmpc.bench.products import Product, plan_products, total_flops, update_products

__all__ = [
    "LaunchFloor",
    "Limit",
    "Product",
    "bench",
    "check",
    "measure_environment",
    "measure_training",
    "plan_products",
    "record",
    "synthetic_batch",
    "total_flops",
    "update_products",
]
