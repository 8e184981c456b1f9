"""Holds an artifact against recorded references: parity, latency and the report. Runs on the device."""
