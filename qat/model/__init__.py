"""Quantized models: conversion of float models, scales, checkpoints and cost."""
