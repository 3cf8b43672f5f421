"""The files of a run's directory, and those of a sweep's, a leaderboard's and a demo's beside them."""

CONFIG, RESULT, TABLES, REPORT = "config.yaml", "result.json", "evaluation.safetensors", "report.html"
LINES = "metrics.jsonl"
WEIGHTS, MANIFEST = "sae.safetensors", "sae.json"
CHECKPOINTS = "checkpoints"
"""A folder."""
COMPARISON = "comparison.html"
"""Of this run with others: written by `sae report`."""
BASELINES = "baselines.json"
"""Other methods on the same activations, and this one, when they were asked for."""
STATUS = "status.json"
"""Of a member of a sweep that was given up: why."""
FEATURES, DIAGNOSIS = "features.csv", "diagnosis.json"
"""Written by `sae eval --diagnose`."""
LATENTS = ("latents.html", "latents.json", "latents.safetensors")
"""Written by `sae latents`."""
CLASSES = "classes.json"
"""Of the digits: what each class's best units score."""
# What a run writes into its directory, and --overwrite deletes: last what it is known by, should that be cut short.
OWN = (
    RESULT,
    TABLES,
    REPORT,
    COMPARISON,
    LINES,
    WEIGHTS,
    MANIFEST,
    CHECKPOINTS,
    STATUS,
    BASELINES,
    FEATURES,
    DIAGNOSIS,
    *LATENTS,
    CLASSES,
    "wandb",
    CONFIG,
)

SUMMARY = "summary.json"
"""Of a demo: a row for each of its runs and baselines."""
SWEEP = "sweep.json"
LEADERBOARD, RECIPE = "leaderboard.json", "recipe.yaml"
