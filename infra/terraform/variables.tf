variable "project" {
  description = "Id of the project that pays for the jobs; it must exist."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "A project's id is 6 to 30 small letters, digits and hyphens, and begins with a letter."
  }
}

variable "region" {
  description = "Region of buckets, images and workers: one, or bytes that cross regions are paid for."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "A region, such as europe-west4; not a zone (europe-west4-a), not a multi-region (EU)."
  }
}

variable "name" {
  description = "Prefix of everything that is made here."
  type        = string
  default     = "braid"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "3 to 20 small letters, digits and hyphens, beginning with a letter: an account's id has no room for more."
  }
}

variable "source_buckets" {
  description = "Names of the existing buckets that hold manifests and media; the workers may read them."
  type        = set(string)

  validation {
    condition     = alltrue([for bucket in var.source_buckets : can(regex("^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$", bucket))])
    error_message = "Bare names of buckets, without gs:// and without a folder."
  }
}

variable "submitters" {
  description = "Who may submit jobs, as group:…, user:… or serviceAccount:…"
  type        = set(string)

  validation {
    condition     = alltrue([for member in var.submitters : can(regex("^(group|user|serviceAccount):[^@[:space:]]+@[^@[:space:]]+$", member))])
    error_message = "Each is group:…, user:… or serviceAccount:… with an address; never allUsers."
  }
}

variable "readers" {
  description = "Who may read the store, trainers for example, as group:…, user:… or serviceAccount:…"
  type        = set(string)
  default     = []

  validation {
    condition     = alltrue([for member in var.readers : can(regex("^(group|user|serviceAccount):[^@[:space:]]+@[^@[:space:]]+$", member))])
    error_message = "Each is group:…, user:… or serviceAccount:… with an address; never allUsers."
  }
}

variable "subnet_range" {
  description = "Addresses of the workers' subnet. Each worker takes one; a /22 is room for 1,020."
  type        = string
  default     = "10.64.0.0/22"

  validation {
    condition     = can(cidrnetmask(var.subnet_range)) && tonumber(split("/", var.subnet_range)[1]) <= 28
    error_message = "An IPv4 range such as 10.64.0.0/22, with at least the 16 addresses of a /28."
  }
}

variable "billing_account" {
  description = "Id of the billing account that the project is on, for the budget's alarm."
  type        = string

  validation {
    condition     = can(regex("^[0-9A-F]{6}-[0-9A-F]{6}-[0-9A-F]{6}$", var.billing_account))
    error_message = "Three groups of six digits and letters A to F, such as 012345-6789AB-CDEF01."
  }
}

variable "monthly_budget" {
  description = "What a month may cost before the alarm, in whole units of the billing account's own currency."
  type        = number

  validation {
    condition     = var.monthly_budget >= 1 && floor(var.monthly_budget) == var.monthly_budget
    error_message = "A whole number of at least 1."
  }
}

variable "alarm_email" {
  description = "Who is told when the budget is nearly spent."
  type        = string

  validation {
    condition     = can(regex("^[^@[:space:]]+@[^@[:space:]]+$", var.alarm_email))
    error_message = "One mail address."
  }
}
