"""Leads transformers and LLaMA-Factory to the installed package vpt-runtime."""

from vpt.remote import *  # noqa: F403
