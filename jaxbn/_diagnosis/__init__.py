"""Diagnosis by running statistics: a report of the layers, and causes of wrong inference."""
