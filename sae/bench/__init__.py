"""`sae bench`: how fast this machine trains SAEs, how far that is from its limits, and how fast others do it.

`shapes` says what is measured, `ceiling` what the hardware can do, `ours` and `rivals` who competes, `timing` how they
take turns, `memory` what they hold, `run` puts it together. Nothing here is imported by `import sae`.
"""
