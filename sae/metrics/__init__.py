"""How well did it go? One definition each, documented where the metric is computed.

    recovery of the dictionary          dictionary_recovery.py
    recovery of the codes               code_recovery.py, from the sums of co_statistics.py
    both with chance and truth beside   ground_truth.py: recovery, feature_table, frequency_deciles
    polysemanticity of any units        polysemanticity.py
    dimensionality and geometry         dimensionality.py
    reconstruction and sparsity         reconstruction.py

Functions return bare names (`mcc`); files and logs add the group (`recovery/mcc`). What is streamed has
`update(batch)` and `compute()`, keeps sums in float64, and does not depend on the batch size.
"""

from sae.metrics.co_statistics import CoStatistics
from sae.metrics.code_recovery import CodeRecovery, ScoreColumns
from sae.metrics.dictionary_recovery import (
    Matching,
    dictionary_chance,
    dictionary_limit,
    dictionary_recovery,
    match_dictionary,
)
from sae.metrics.dimensionality import dimensionality, dimensionality_against_truth
from sae.metrics.ground_truth import feature_table, firing, frequency_deciles, recovery
from sae.metrics.inputs import scale_threshold
from sae.metrics.polysemanticity import polysemanticity, unit_scores
from sae.metrics.reconstruction import Reconstruction

__all__ = [
    "CoStatistics",
    "CodeRecovery",
    "Matching",
    "Reconstruction",
    "ScoreColumns",
    "dictionary_chance",
    "dictionary_limit",
    "dictionary_recovery",
    "dimensionality",
    "dimensionality_against_truth",
    "feature_table",
    "firing",
    "frequency_deciles",
    "match_dictionary",
    "polysemanticity",
    "recovery",
    "scale_threshold",
    "unit_scores",
]
