"""Everything that is sent to MLflow and asked of it.

The driver opens an ``Experiment`` and, in it, one ``Run`` per identity. The run's address travels to rank 0, whose
``MetricWriter`` is the only writer of its metrics. This package does not use MLflow's fluent API and leaves no state in
MLflow. Its modules import MLflow, which takes 1.5 s: a command imports them after it has parsed its options.
"""
