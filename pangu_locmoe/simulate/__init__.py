"""A step-time model of clusters that are not there. NumPy only.

cost.py has the equations; layout.py who holds what, routing.py and rows.py how many rows each
replica sends and computes; model.py joins them for a configuration; calibration.py fits the model
to measured steps, paper.py applies it to LocMoE's clusters.
"""

from pangu_locmoe.simulate.devices import Device, load_devices
from pangu_locmoe.simulate.model import Assumptions, Simulation, simulate

__all__ = ["Assumptions", "Device", "Simulation", "load_devices", "simulate"]
