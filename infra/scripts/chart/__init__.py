"""What `make chart` runs: renders the chart, validates what it renders, and holds it to a policy.

- It runs in an environment of its own (infra/scripts/chart.sh) and imports nothing of Regreen.
"""
