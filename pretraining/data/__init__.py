"""Crops: from volumes on disk to a batch on the device."""
