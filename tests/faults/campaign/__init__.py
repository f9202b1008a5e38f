"""The fault campaign: real runs and searches on a cluster of three hosts, and what breaks under them.

python -m tests.faults.campaign --seed 1 --log campaign.jsonl
python -m tests.faults.campaign --table campaign.jsonl

Needs Linux namespaces (root, or a system where users may have them), iproute2 and util-linux.
"""
