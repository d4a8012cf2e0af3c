"""What running statistics say of a model: a report of its layers, and causes of wrong inference."""
