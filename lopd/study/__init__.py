"""Studies: a grid of arms × seeds over one store of artefacts, its tables and figures.

A study file (`configs/reproduction.py`) names teachers, arms and sections; `python -m lopd.study`
runs what is missing and writes the results.
"""

from lopd.study.design import Arm, Section, Study

__all__ = ["Arm", "Section", "Study"]
