"""Quantisation that looks at calibration text; needs PyTorch and transformers (extra ``qat``)."""
