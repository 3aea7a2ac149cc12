"""Run timm's own scripts on the models of this package: ``python -m ulsam.timm validate.py DATA --model ulsam_...``."""
