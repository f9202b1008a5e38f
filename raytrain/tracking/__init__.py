"""All communication with MLflow.

The driver opens an ``Experiment`` and, in it, one ``Run`` per identity. The run's address is passed to rank 0, whose
``MetricWriter`` is the only writer of its metrics. This package does not use MLflow's fluent API and leaves no global
state in MLflow. Its modules import MLflow, which takes 1.5 s, so a command imports them after parsing its options.
"""
