terraform {
  required_version = ">= 1.9, < 2.0"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "= 6.50.0"
    }
  }

  # Where the state lives is given at init: terraform init -backend-config=bucket=… -backend-config=prefix=braid
  backend "gcs" {}
}

provider "google" {
  project = var.project
  region  = var.region

  # The budget API refuses a person's own credentials without a project to charge the call to.
  billing_project       = var.project
  user_project_override = true
}
