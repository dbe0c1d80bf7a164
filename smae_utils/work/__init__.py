"""What one does with both: settings, training, evaluation, prediction."""
