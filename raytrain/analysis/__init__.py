"""What is measured and drawn of trained models and searches: evaluations, text metrics, tables, figures, reports."""
