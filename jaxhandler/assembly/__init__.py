"""From a loss expression to the model, the loss, the evaluator and the columns they need."""
