"""Sampling programs: guidance, inversion, editing, steering, each as short as its algorithm."""
