"""How well did it go? One definition each, documented where the metric is computed.

    recovery of the dictionary          dictionary_recovery.py
    recovery of the codes               code_recovery.py, from the sums of co_statistics.py
    both with chance and truth beside   ground_truth.py: recovery, feature_table, frequency_deciles
    polysemanticity of any units        polysemanticity.py
    dimensionality and geometry         dimensionality.py
    reconstruction and sparsity         reconstruction.py
    what a language model loses         language_model.py
    intervals over seeds                seeds.py

Functions return bare names (`mcc`); files and logs add the group (`recovery/mcc`). What is streamed has
`update(batch)` and `compute()`, keeps sums in float64, and does not depend on the batch size.
"""

from sae.metrics.co_statistics import CoStatistics
from sae.metrics.code_recovery import CodeRecovery
from sae.metrics.dictionary_recovery import (
    Matching,
    dictionary_chance,
    dictionary_limit,
    dictionary_recovery,
    match_dictionary,
)
from sae.metrics.dimensionality import dictionary_dimensionality, dimensionality
from sae.metrics.failures import failures_beside_chance
from sae.metrics.ground_truth import (
    codes_beside_chance,
    dictionary_beside_chance,
    feature_table,
    firing,
    frequency_deciles,
    judge_codes,
    recovery,
    table_of_features,
)
from sae.metrics.inputs import compressed, row_norms, scale_threshold
from sae.metrics.language_model import Spliced
from sae.metrics.polysemanticity import (
    Neurons,
    latents_beside_chance,
    polysemanticity,
    related_features,
    truth_as_units,
    unit_scores,
)
from sae.metrics.ranking import Ranking
from sae.metrics.reconstruction import Reconstruction
from sae.metrics.samples import Samples, window_rows
from sae.metrics.seeds import Interval, interval, over_seeds

__all__ = [
    "CoStatistics",
    "CodeRecovery",
    "Interval",
    "Matching",
    "Neurons",
    "Ranking",
    "Reconstruction",
    "Samples",
    "Spliced",
    "codes_beside_chance",
    "compressed",
    "dictionary_beside_chance",
    "dictionary_chance",
    "dictionary_dimensionality",
    "dictionary_limit",
    "dictionary_recovery",
    "dimensionality",
    "failures_beside_chance",
    "feature_table",
    "firing",
    "frequency_deciles",
    "interval",
    "judge_codes",
    "latents_beside_chance",
    "match_dictionary",
    "over_seeds",
    "polysemanticity",
    "recovery",
    "related_features",
    "row_norms",
    "scale_threshold",
    "table_of_features",
    "truth_as_units",
    "unit_scores",
    "window_rows",
]
